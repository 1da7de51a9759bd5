"""What only a camera needs: capture, clock, mailbox, ladder, one encoder with many outputs, and a page to look at."""
