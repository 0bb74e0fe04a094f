"""What people look at and take away: predictions as a table and a page, a local server, an exported network."""
