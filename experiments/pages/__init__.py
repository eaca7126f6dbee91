"""What people read: a page from parts (page), the report (report), its rows in groups (groups), its plots (plots)."""
