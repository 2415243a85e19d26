"""Who is there: the store that a service's processes share, the instances it lists, and their elected leader."""
