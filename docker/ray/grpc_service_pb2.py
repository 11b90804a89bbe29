"""The protocol's messages under the name that they are pickled by.

Ray hands messages from proxy to replica pickled, and tritonclient's generated code says that they come from a module
of this name, which tritonclient does not have. It must be importable on every node of the cluster.
"""

from tritonclient.grpc.service_pb2 import *  # noqa: F403
