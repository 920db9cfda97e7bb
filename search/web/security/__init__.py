"""Protection of the web service: headers, origins, logins, limits. All of it is ASGI middleware around the routes."""
