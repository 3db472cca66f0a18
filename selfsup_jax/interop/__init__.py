"""Other projects' checkpoints in; encoders out, in the layouts that other projects read."""
