"""unit/ needs no root; kernel/ uses network namespaces; store/ a real etcd; system/ several hosts; testbed/ is shared."""
