"""What has happened lately, for `/debug/trace`: kept in rings, shown as trace events."""
