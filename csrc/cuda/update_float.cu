#include "update.cuh"

namespace fusedopt::cuda {

const UpdateKernel* const updates_in_float = updates<float>;

}
