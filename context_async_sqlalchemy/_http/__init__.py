"""A unit of work for each request: the middleware, and what is made of it for each framework."""
