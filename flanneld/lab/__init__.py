"""Several hosts on one machine: namespaces, an underlay, a real etcd. The demo, the tests and the bench are made of it.

Nothing that runs in production imports this package.
"""
