from mergekit_lite.commands import main

main(prog_name="mergekit-lite")
