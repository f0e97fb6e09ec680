# LoRA adapters of one base into one adapter, by their products and never by A and B apart. Each command by itself:
# PATH:WEIGHT gives a weight, any rank, alpha and rsLoRA will do, and -p gives a parameter of the method.

# TIES in the core space (arXiv 2509.17786): of each module's Σr × Σr numbers the largest half, signs elected.
mergekit-lite vector combine --space core --method ties -p density=0.5 ./adapter-a:0.6 ./adapter-b:0.4 -o ./core-ties

# TSV-M there: each adapter's own share of singular vectors, made orthogonal to the others'.
mergekit-lite vector combine --space core --method tsv ./adapter-a ./adapter-b -o ./core-tsv

# Iso-C there: all singular values of the sum made equal. The mean is over the core's values, not over the matrix's.
mergekit-lite vector combine --space core --method iso_c ./adapter-a ./adapter-b -o ./core-iso

# DARE there: nine tenths of the numbers dropped by chance, the others grown.
mergekit-lite vector combine --space core --method dare_linear -p density=0.1 ./adapter-a:0.5 ./adapter-b:0.5 -o ./core-dare

# KnOTS (arXiv 2410.19735): TIES on the products in their common left basis.
mergekit-lite vector combine --space knots --method ties -p density=0.2 ./adapter-a:0.5 ./adapter-b:0.5 -o ./knots-ties

# A plain average, cut back to rank 16; the share that is cut off is told, with -v for each module.
mergekit-lite vector combine --space core --method linear ./adapter-a:0.5 ./adapter-b:0.5 --rank 16 -o ./average

# What it brought that the base has nothing like, made weaker (arXiv 2410.21228): some of what was forgotten comes back.
mergekit-lite vector intruders org/base ./average --lambda 0.75 -o ./milder
