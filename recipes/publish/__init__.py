"""Put what runs made on the Hub: one folder that is exactly what is uploaded, then one commit."""
