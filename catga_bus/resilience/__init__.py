"""What happens when calls fail or too many come: breaker, rate limit, bulkhead; pure state and a thin shell each."""
