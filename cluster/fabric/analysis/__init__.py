"""From measured rates and times to culprits. Pure numpy: no torch, no measuring."""
