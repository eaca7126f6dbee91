"""What people read: parts of a page (page), a table and its words (report), rows by cell (groups), pictures (plots)."""
