from mergekit_lite.commands import start

start()
