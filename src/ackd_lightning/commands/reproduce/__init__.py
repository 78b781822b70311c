"""``ackd reproduce``: plan the runs of a table, start them, write the table; nothing is trained in this process."""
