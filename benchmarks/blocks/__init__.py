"""How large a block should be: bandwidth of attention, unused memory, size of the tables."""
