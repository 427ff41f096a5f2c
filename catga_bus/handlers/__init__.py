"""What users register: handlers, routers, middleware and dependencies, and all that is found out about them."""
