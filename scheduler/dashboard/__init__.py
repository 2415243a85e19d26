"""GET /dashboard: what the service does and has done lately, as one page to look at."""
