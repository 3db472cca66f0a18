"""One file per method or job; `file.py:preset,field=value`."""
