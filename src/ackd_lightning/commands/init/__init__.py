"""``ackd init``: looks at a folder of photos and writes two configurations; nothing is trained here."""
