"""The decoder: plain torch modules that know no processes, groups or meshes."""
