# trivium_cpu_sources(target): the CPU kernels, compiled once per instruction set and chosen when a model is made.
function(trivium_cpu_sources target)
  set(csrc ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/csrc)
  target_sources(${target} PRIVATE ${csrc}/mcheads.cpp ${csrc}/model.cpp ${csrc}/run.cpp ${csrc}/ort_op.cpp
                                   ${csrc}/ort_tensor.cpp ${csrc}/cpu_scalar.cpp)
  # One rounding per operation as written: a picture's bits must not depend on what the compiler contracts.
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffp-contract=off>")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64|AMD64")
    target_sources(${target} PRIVATE ${csrc}/cpu_avx2.cpp ${csrc}/cpu_avx512.cpp)
    target_compile_definitions(${target} PRIVATE TRIVIUM_X86)
    set_property(SOURCE ${csrc}/cpu_avx2.cpp PROPERTY COMPILE_OPTIONS -mavx2 -mfma)
    # GCC 12 warns of its own intrinsics, whose unused operand is undefined on purpose.
    set_property(SOURCE ${csrc}/cpu_avx512.cpp PROPERTY COMPILE_OPTIONS -mavx512f -mfma -Wno-uninitialized
                                                        -Wno-maybe-uninitialized)
  endif()
endfunction()
