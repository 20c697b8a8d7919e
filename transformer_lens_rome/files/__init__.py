"""Reading and writing files, with checks of files that come from others."""
