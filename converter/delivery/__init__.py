"""From registry to server: fetch, convert, verify, hold the gates, publish, announce."""
