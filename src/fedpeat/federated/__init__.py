"""The federation: rounds, participants, transports, screening and aggregation."""
