"""The commands of ``sltscale``: a file each, with its arguments and its work; heavy imports inside the work."""
