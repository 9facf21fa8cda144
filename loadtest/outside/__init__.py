"""The same requests measured by our client and by tools that others wrote."""
