// selfcheck NAME right|broken SEEDS: runs a check with each of the seeds from 0 on, until one is wrong.
#include "selfcheck.h"

int main(int count, char** arguments) {
    using namespace selfcheck;
    if (count == 2 && !strcmp(arguments[1], "list")) {
        for (const Registered* known = Registered::first(); known; known = known->next) puts(known->name);
        return 0;
    }
    if (count != 4) return 2;
    for (const Registered* known = Registered::first(); known; known = known->next) {
        if (strcmp(known->name, arguments[1])) continue;
        for (int seed = 0; seed < atoi(arguments[3]); ++seed) {
            cuda_on_host::cuda_on_host_seed(uint64_t(seed));
            if (known->check(!strcmp(arguments[2], "broken"))) continue;
            printf("wrong with seed %d\n", seed);
            return 1;
        }
        return 0;
    }
    return 2;
}
