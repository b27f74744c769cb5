"""Pure choice of a subnet: which leases are ours, which subnets are free, which one to claim."""
