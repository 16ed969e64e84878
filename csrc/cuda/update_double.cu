#include "update.cuh"

namespace fusedopt::cuda {

const UpdateKernel* const updates_in_double = updates<double>;

}
