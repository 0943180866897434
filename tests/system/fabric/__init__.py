"""Real fabrics on one machine: hosts as network namespaces, switches as bridges, faults injected by the kernel's own means."""
