"""Config files, one per method or job; a config is given as `file.py:preset,field=value`."""
