"""Devices and hosts: the only package that uses pmap, shard_map and the mapped axis."""
