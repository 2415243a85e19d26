"""A service of many instances as discrete events: the policies that serve, on predicted steps and a simulated clock."""
