# Sets TENSORRT_HEADERS to the folder of NvInferRuntime.h, from TENSORRT_ROOT, the system, or the package index.
# Headers only: the plugin links nothing of TensorRT.
set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "Where TensorRT is unpacked or installed")
option(PIFA_FETCH_TENSORRT_HEADERS "Take the TensorRT headers from the package index" OFF)

find_path(TENSORRT_HEADERS NvInferRuntime.h
  HINTS "${TENSORRT_ROOT}" "${TENSORRT_ROOT}/include"
  PATH_SUFFIXES "include/${CMAKE_LIBRARY_ARCHITECTURE}" "targets/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu/include"
  PATHS /usr/local/tensorrt/include /opt/tensorrt/include
  DOC "Folder of NvInferRuntime.h")

if(NOT TENSORRT_HEADERS AND PIFA_FETCH_TENSORRT_HEADERS)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(fetched "${CMAKE_BINARY_DIR}/tensorrt-headers")
  execute_process(COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/fetch_headers.py" "${fetched}"
    RESULT_VARIABLE failed ERROR_VARIABLE said)
  if(failed)
    message(FATAL_ERROR "TensorRT headers: ${said}")
  endif()
  set(TENSORRT_HEADERS "${fetched}" CACHE PATH "Folder of NvInferRuntime.h" FORCE)
endif()

if(NOT TENSORRT_HEADERS)
  message(FATAL_ERROR "NvInferRuntime.h was not found. Set TENSORRT_ROOT to a TensorRT 10.14 or newer folder, install "
    "libnvinfer-headers-dev, or pass -DPIFA_FETCH_TENSORRT_HEADERS=ON to download the headers (1 MB).")
endif()

file(STRINGS "${TENSORRT_HEADERS}/NvInferVersion.h" version_lines REGEX "define (TRT|NV_TENSORRT)_(MAJOR|MINOR)")
string(REGEX MATCH "MAJOR[A-Z_]* ([0-9]+)" _ "${version_lines}")
set(TENSORRT_MAJOR "${CMAKE_MATCH_1}")
string(REGEX MATCH "MINOR[A-Z_]* ([0-9]+)" _ "${version_lines}")
set(TENSORRT_MINOR "${CMAKE_MATCH_1}")
if(TENSORRT_MAJOR LESS 10)
  message(FATAL_ERROR "${TENSORRT_HEADERS} holds TensorRT ${TENSORRT_MAJOR}.${TENSORRT_MINOR}, expected 10 or newer.")
endif()
message(STATUS "TensorRT headers ${TENSORRT_MAJOR}.${TENSORRT_MINOR}: ${TENSORRT_HEADERS}")
