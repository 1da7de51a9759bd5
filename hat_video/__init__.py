"""Video super-resolution with HAT."""
