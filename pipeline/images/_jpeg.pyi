"""C functions, called by address; see jpeg.py."""
