"""The Protocols that parts meet at. Implementations live above; nobody here knows one."""
