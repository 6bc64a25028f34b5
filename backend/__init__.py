"""What Label Studio and people talk to: the ML API, the admin page, the command line."""
