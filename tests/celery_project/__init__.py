"""A Django project with Celery, run by tests/workers.py in processes of its own."""
