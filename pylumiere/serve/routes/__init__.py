"""The routes, a file per resource; each has one function that adds them to the application.

A route reads the request, calls the service and forms the answer. What a request means is said in `service.py`.
"""
