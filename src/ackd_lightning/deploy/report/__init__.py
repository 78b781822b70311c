"""The page of ``ackd report``: what is measured, the figures, and the page as Markdown and HTML; no command line."""
