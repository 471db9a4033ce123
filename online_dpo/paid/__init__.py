"""The only paid door: calls to models behind an API, their ledger, budget, rates and prices."""
