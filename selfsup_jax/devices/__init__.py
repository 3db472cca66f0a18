"""Devices and hosts: the only package that knows pmap, shard_map and the mapped axis."""
