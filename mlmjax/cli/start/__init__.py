"""Begin a run: sizes of this machine enter, a run file with comments or a table leaves."""
