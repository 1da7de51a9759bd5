"""How good the pictures are: the field's protocol on stills, real clips through the real command, sheets to look at."""
