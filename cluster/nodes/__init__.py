"""Every node of a cluster looked at, one beside the other: `gyre doctor --cluster`."""
