"""Who answers in production: numbered versions, the gate between them, and the log of who was promoted."""
