"""Requests to models: store, scheduler, clients, budget."""
