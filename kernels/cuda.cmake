# The CUDA kernels: built into libtrivium where nvcc is found, left out without a word elsewhere.
set(TRIVIUM_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (where nvcc works), ON or OFF")

if(TRIVIUM_CUDA STREQUAL "OFF")
  return()
endif()

# Asked for before CUDA is enabled, which fills in a default.
set(chosen_architectures ${CMAKE_CUDA_ARCHITECTURES})
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit)
endif()
if(NOT TARGET CUDA::cudart_static)
  if(NOT TRIVIUM_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "TRIVIUM_CUDA is ${TRIVIUM_CUDA}, but no nvcc that works with ${CMAKE_CXX_COMPILER} is found, "
                        "or no static CUDA runtime")
  endif()
  return()
endif()

# Machine code for Ampere (and Ada), Hopper and Blackwell; newer cards compile the last one's PTX at first use.
if(NOT chosen_architectures)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(chosen_architectures 80-real 90-real 100)
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 11.8)
    set(chosen_architectures 80-real 90)
  else()
    message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is older than 11.8: no CUDA kernels")
    return()
  endif()
endif()

add_library(trivium_cuda OBJECT csrc/cuda_run.cu csrc/cuda_model.cpp csrc/cuda_gemm.cpp csrc/cuda_abi.cpp
                                csrc/ort_cuda.cpp)
target_link_libraries(trivium_cuda PRIVATE CUDA::cudart_static)
set_target_properties(trivium_cuda PROPERTIES
  POSITION_INDEPENDENT_CODE ON
  CUDA_ARCHITECTURES "${chosen_architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  CXX_VISIBILITY_PRESET hidden)
target_compile_features(trivium_cuda PRIVATE cxx_std_17)
target_compile_options(trivium_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
target_compile_definitions(trivium PRIVATE TRIVIUM_CUDA)
target_sources(trivium PRIVATE $<TARGET_OBJECTS:trivium_cuda>)
# The runtime is linked in whole, and its symbols stay inside: another copy, torch's say, may live in the process.
target_link_libraries(trivium PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
target_link_options(trivium PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(trivium PROPERTIES LINKER_LANGUAGE CXX CUDA_ARCHITECTURES "${chosen_architectures}")
